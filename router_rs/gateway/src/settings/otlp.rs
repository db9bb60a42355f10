//! Settings of spans that go to a collector, which go together.

use super::{Settings, SettingsError};
use crate::telemetry::{Address, Headers};

impl Settings {
    pub(super) fn otlp_together(&self) -> Result<(), SettingsError> {
        let wrong = |message: String| Err(SettingsError::Together(message));
        let address = Address::read(&self.otlp_endpoint);
        if !self.otlp_endpoint.is_empty() && address.is_none() {
            return Err(SettingsError::Value {
                from: "otlp_endpoint".to_owned(),
                key: "otlp_endpoint",
                value: self.otlp_endpoint.clone(),
                allowed: "host:port, http://host:port or https://host:port, or nothing".to_owned(),
            });
        }
        let secure = address.is_some_and(|address| address.secure);
        if secure && self.otlp_ca.is_none() {
            return wrong(
                "otlp_endpoint is https://host:port, which needs otlp_ca: the authorities that \
                 its certificate may come from, such as /etc/ssl/certs/ca-certificates.crt"
                    .to_owned(),
            );
        }
        if !secure && self.otlp_ca.is_some() {
            return wrong(
                "otlp_ca needs an otlp_endpoint of the form https://host:port: without it there \
                 is no TLS"
                    .to_owned(),
            );
        }
        match Headers::read(&self.otlp_headers.0) {
            Ok(_) => Ok(()),
            Err(why) => wrong(format!(
                "otlp_headers cannot be used: {why}; allowed is NAME=VALUE with commas between \
                 and values percent-encoded"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Layers;
    use super::*;

    fn refused(file: &str) -> Option<String> {
        let mut layers = Layers::default();
        layers.add_toml("test.toml", file).unwrap();
        let refused = Settings::resolve(&layers).err();
        refused.map(|error| error.to_string())
    }

    #[test]
    fn what_needs_something_else_says_so() {
        for (file, needed) in [
            ("otlp_endpoint = 'https://a:1'", "otlp_ca"),
            ("otlp_endpoint = 'a:1'\notlp_ca = 'c'", "https://"),
            ("otlp_ca = 'c'", "https://"),
            ("otlp_headers = 'a-secret'", "NAME=VALUE"),
            ("otlp_endpoint = 'ftp://a:1'", "https://host:port"),
        ] {
            let why = refused(file).unwrap();
            assert!(why.contains(needed), "{why}");
            assert!(!why.contains("a-secret"), "{why}");
        }
        let whole = "otlp_endpoint = 'https://a:1'\notlp_ca = 'c'\notlp_headers = 'a=b'";
        assert_eq!(refused(whole), None);
    }

    #[test]
    fn headers_are_not_printed() {
        let mut layers = Layers::default();
        let file = "otlp_headers = 'a=a-secret'";
        layers.add_toml("test.toml", file).unwrap();
        let settings = Settings::resolve(&layers).unwrap();
        assert!(!format!("{settings:?}").contains("a-secret"));
        for wrong in [
            "{ authorization = 'a-secret' }",
            "['authorization=a-secret']",
        ] {
            let file = format!("otlp_headers = {wrong}");
            let why = Layers::default().add_toml("test.toml", &file).unwrap_err();
            let why = why.to_string();
            assert!(why.contains("otlp_headers"), "{why}");
            assert!(!why.contains("a-secret"), "{why}");
        }
    }
}
