"""How questions reach endpoints: attempts, rotation, faults of HTTP, answers kept on disk."""
