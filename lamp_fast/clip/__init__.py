"""The frozen CLIP: its towers, where its weights come from, and class prompts as its tokens."""
