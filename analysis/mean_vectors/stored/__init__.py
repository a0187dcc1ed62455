"""The files of a folder of mean vectors, and how they are read without trusting them."""
