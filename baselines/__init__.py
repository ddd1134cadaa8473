"""The Method protocol, its registry, and one module a method (FuseLLM is one of them)."""
