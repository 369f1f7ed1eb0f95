"""The library's front door: one request in, one outcome out. Only this room composes stages."""
