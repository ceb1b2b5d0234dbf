"""What is optimised and seen: cameras, field, renderer, images, meshes."""
