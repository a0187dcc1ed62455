"""What is exported: the request, the items of a part, and which of them a file has."""
