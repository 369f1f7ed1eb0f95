"""The library's front door: stages put together, one request in, one outcome out."""
