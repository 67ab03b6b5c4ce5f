//! evergate-testkit
