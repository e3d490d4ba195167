"""Transport to endpoints: HTTP client, retries, rotation, cache of answers on disk."""
