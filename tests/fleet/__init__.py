"""What a fleet costs its server: load from many devices, and the morning after a power cut."""
