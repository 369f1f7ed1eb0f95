"""What each weight loses in each tier: predicted from one backward pass, or measured."""
