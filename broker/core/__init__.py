"""The Broker core: sessions, mailboxes, delivery, acknowledgments; no sockets, no clock."""
