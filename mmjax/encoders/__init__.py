"""Media encoders: patches and frames to features."""
