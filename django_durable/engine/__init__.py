"""The protocol: claim, replay, checkpoint, finish, recover. Every function takes the database's alias."""
