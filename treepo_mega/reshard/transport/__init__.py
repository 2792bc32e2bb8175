"""How planned copies travel between ranks."""
