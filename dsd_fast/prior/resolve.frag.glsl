#version 330
// Box filter of the supersampled image, straight alpha, first row on top.
uniform sampler2D image;
uniform int size;
uniform int factor;
uniform int tile;
out vec4 straight;
void main() {
    ivec2 pixel = ivec2(gl_FragCoord.xy) - ivec2(0, tile * size);
    pixel.y = size - 1 - pixel.y;
    vec4 sum = vec4(0.0);
    for (int y = 0; y < factor; ++y)
        for (int x = 0; x < factor; ++x)
            sum += texelFetch(image, pixel * factor + ivec2(x, y), 0);
    sum /= float(factor * factor);
    straight = vec4(sum.a > 0.0 ? sum.rgb / sum.a : vec3(0.0), sum.a);
}
