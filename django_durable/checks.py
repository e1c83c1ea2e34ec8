"""System checks, tag "durable": see docs/reference/checks.md."""
