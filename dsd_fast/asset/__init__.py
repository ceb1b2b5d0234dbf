"""Objects as other programs take them: triangles, textures, and the files that hold them."""
