"""The values that travel between the stages: frozen, printable, saved as versioned JSON."""
