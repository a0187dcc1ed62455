"""This project and its peers on the same model and prompts."""
