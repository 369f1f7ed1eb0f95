"""The demo models: a small gpt-oss that answers (SmolLM2, upcycled), and SmolLM2 itself."""
