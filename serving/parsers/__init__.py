"""From an answer's text to what a chat client wants of it: reasoning, content, tool calls."""
