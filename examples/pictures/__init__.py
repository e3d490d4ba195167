"""The world of pictures: small drawn scenes, a lossy autoencoder and an editor that wears them."""
