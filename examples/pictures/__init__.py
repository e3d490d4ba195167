"""The world of pictures: small drawn scenes, a lossy autoencoder, and a tiny editor."""
