"""How codes are chosen on a number grid: arrays in, arrays out. Its modules need torch and are imported where used."""
