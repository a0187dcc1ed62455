"""gcloud: what may reach it, how it is called, and what it lists."""
