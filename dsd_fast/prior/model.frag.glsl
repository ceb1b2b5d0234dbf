uniform sampler2DArray textures;
uniform float alpha_test;  // opaque pass: discard below, then alpha is 1; 0 in the blended pass
in vec3 position;
in vec3 normal;
in vec2 uv;
flat in vec4 colour;
flat in vec2 part;
out vec4 premultiplied;
void main() {
    vec4 base = colour;
    if (part.x >= 0.0) {
        vec4 texel = texture(textures, vec3(uv, part.x));
        base = vec4(texel.rgb, texel.a * colour.a);
    }
    if (base.a < alpha_test) discard;
    if (alpha_test > 0.0) base.a = 1.0;
    if (part.y > 0.5 && paint.a > 0.5) {
        float luma = dot(base.rgb, vec3(0.299, 0.587, 0.114));
        float relief = part.x >= 0.0 ? clamp(luma / max(material.z, 0.05), 0.3, 1.6) : 1.0;
        base.rgb = min(paint.rgb * relief, 1.0);
    }
    vec3 to_camera = normalize(camera.xyz - position);
    vec3 n = normalize(normal);
    if (dot(n, to_camera) < 0.0) n = -n;  // winding is inconsistent: shade both sides
    vec3 light = mix(ground.rgb, sky.rgb, 0.5 + 0.5 * n.z)
        + key.w * max(dot(n, key.xyz), 0.0) + fill.w * max(dot(n, fill.xyz), 0.0);
    float highlight = material.x * key.w
        * pow(max(dot(n, normalize(key.xyz + to_camera)), 0.0), material.y);
    vec3 shaded = min(base.rgb * light + highlight, 1.0);
    premultiplied = vec4(shaded * base.a, base.a);
}
