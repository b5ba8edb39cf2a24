"""HySparse on a stock transformers model: config, forward state, attention, registration."""
