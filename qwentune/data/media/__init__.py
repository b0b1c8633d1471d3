"""Pictures, videos and sounds: opened while rows are rendered, loaded when a batch is made."""
