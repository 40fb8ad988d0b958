"""The study of stored weights that experiments/language_model and experiments/sentence_encoder share."""
