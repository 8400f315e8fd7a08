"""What the tests are made of besides the real servers: subscriber, checker, relay processes, proxies."""
