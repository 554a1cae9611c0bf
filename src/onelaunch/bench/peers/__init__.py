"""What a user could pick instead, each behind the call that ours has."""
