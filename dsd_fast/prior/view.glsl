#version 330
// What both shaders of a model know of the view.
layout(std140) uniform View {
    mat4 view_projection;
    vec4 camera;    // position
    vec4 key;       // direction to the light, strength
    vec4 fill;      // direction to the light, strength
    vec4 sky;       // ambient from above
    vec4 ground;    // ambient from below
    vec4 paint;     // colour, 1 when the main part is painted
    vec4 material;  // specular strength, exponent, median luma of the main part
    vec4 stretch;   // of the model's axes
};
