"""Transport to endpoints: HTTP client, retries, rotation, answers cached on disk."""
