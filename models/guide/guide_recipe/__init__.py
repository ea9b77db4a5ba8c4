"""The recipe behind the shipped guide model: facts, paraphrases, tokenizer, network, judge."""
