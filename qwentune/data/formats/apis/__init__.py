"""What the APIs of Anthropic and OpenAI have otherwise than the format chat, in their messages and in their logs."""
