"""What the formats of dialogues share: messages, calls, and what stands beside them."""
