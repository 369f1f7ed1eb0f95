"""A gpt-oss that can really speak, small enough to try everything on: SmolLM2, upcycled."""
