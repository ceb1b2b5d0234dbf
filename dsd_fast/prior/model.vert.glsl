in vec3 in_position;
in vec3 in_normal;
in vec2 in_uv;
in vec4 in_colour;
in vec2 in_part;  // texture layer or -1, 1 on the main part
out vec3 position;
out vec3 normal;
out vec2 uv;
flat out vec4 colour;
flat out vec2 part;
void main() {
    position = in_position * stretch.xyz;
    normal = in_normal / stretch.xyz;
    uv = in_uv;
    colour = in_colour;
    part = in_part;
    gl_Position = view_projection * vec4(position, 1.0);
}
