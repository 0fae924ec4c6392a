"""Fine-tuning methods: what each allows (`table.py`, no torch) and how each is built."""
