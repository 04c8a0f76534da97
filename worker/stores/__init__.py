"""Where sessions are kept: adapters of `ports.SessionStore`."""
