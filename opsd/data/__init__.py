"""Rows: files, columns, what a row must hold, in which order rows come. Knows no tokenizer."""
