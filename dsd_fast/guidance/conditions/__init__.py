"""What a view asks for: text by azimuth, several cameras at once, one picture and a pose."""
