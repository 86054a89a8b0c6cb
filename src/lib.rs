//! vmig
