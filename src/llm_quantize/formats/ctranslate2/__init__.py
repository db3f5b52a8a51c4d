"""CTranslate2 models: model.bin, config.json and vocabulary.json, as its own converter makes them."""
