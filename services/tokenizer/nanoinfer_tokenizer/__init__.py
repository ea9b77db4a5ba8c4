"""The tokenizer service: text to ids and back, chat templates, the vocabulary."""
