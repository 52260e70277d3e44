"""What a competitor needs and should not have to edit."""
