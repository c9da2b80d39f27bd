"""When a person is told of something, once, and by which channel; not what is wrong with a database."""
