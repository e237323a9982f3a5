"""`load`, and the `LanguageModel` that it returns: logits, scores, text."""
