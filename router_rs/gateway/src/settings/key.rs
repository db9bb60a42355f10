//! What a setting is: its name, its kind, and values in one form.

use serde_json::{Value, json};

/// What values a key takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Any text.
    Text,
    /// One of these.
    OneOf(&'static [&'static str]),
    /// IP address and port.
    Address,
    /// IP address and port, or nothing.
    AddressOrNone,
    /// Texts; as one text separated by commas.
    List,
    /// true or false.
    Flag,
    /// A whole number within bounds, both allowed.
    Number(u64, u64),
    /// A number within bounds, both allowed.
    Real(f64, f64),
    /// Bytes within bounds; `16MiB`, `512KiB` or a bare number of bytes.
    Bytes(u64, u64),
    /// A time in milliseconds within bounds; written `250ms`, `10s`, `5m`,
    /// `1h`, or as a bare number of seconds.
    Time(u64, u64),
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Name in files and JSON; `--kebab-case` as a flag, `KVMESH_UPPER_CASE` as
    /// a variable.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// The value if none is given, as text.
    pub default: &'static str,
    /// What it is.
    pub help: &'static str,
}

impl Key {
    /// Whether no value of it may be told to anyone.
    pub(super) fn is_secret(&self) -> bool {
        SECRET.contains(&self.name)
    }
}

/// Settings that are secrets by themselves; others name files.
const SECRET: &[&str] = &["otlp_headers"];

pub(super) const HOUR: u64 = 3_600_000;
pub(super) const GIB: u64 = 1 << 30;

/// A setting, for tables of them.
pub(super) const fn key(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Key {
    Key {
        name,
        kind,
        default,
        help,
    }
}

impl Key {
    /// The flag, without its dashes.
    #[must_use]
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// The environment variable.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("KVMESH_{}", self.name.to_ascii_uppercase())
    }

    /// What is allowed, in words.
    #[must_use]
    pub fn allowed(&self) -> String {
        match self.kind {
            Kind::Text => "a text".to_owned(),
            Kind::OneOf(all) => all.join(" | "),
            Kind::Address => "an IP address and a port, such as 127.0.0.1:7440".to_owned(),
            Kind::AddressOrNone => {
                "an IP address and a port, such as 127.0.0.1:7441, or nothing".to_owned()
            }
            Kind::List => "a list of texts, or one text with commas".to_owned(),
            Kind::Flag => "true | false".to_owned(),
            Kind::Number(least, most) => format!("a whole number, {least} to {most}"),
            Kind::Real(least, most) => format!("a number, {least} to {most}"),
            Kind::Bytes(least, most) => {
                format!("bytes, {least} to {most}, or with a unit, such as 16MiB")
            }
            Kind::Time(least, most) => {
                format!("a time with its unit (ms, s, m, h), {least}ms to {most}ms; bare: seconds")
            }
        }
    }

    /// The default in its checked form.
    pub(crate) fn default_value(&self) -> Value {
        self.check(&Value::String(self.default.to_owned()))
            .unwrap_or(Value::Null)
    }

    /// The value in one form (numbers: bytes or milliseconds), or what is
    /// allowed.
    pub(crate) fn check(&self, value: &Value) -> Result<Value, String> {
        let allowed = || self.allowed();
        let text = || value.as_str().map(str::trim);
        match self.kind {
            Kind::Text => text().map(|text| json!(text)).ok_or_else(allowed),
            Kind::OneOf(all) => text()
                .filter(|text| all.contains(text))
                .map(|t| json!(t))
                .ok_or_else(allowed),
            Kind::Address => text()
                .filter(|text| text.parse::<std::net::SocketAddr>().is_ok())
                .map(|text| json!(text))
                .ok_or_else(allowed),
            Kind::AddressOrNone => text()
                .filter(|text| text.is_empty() || text.parse::<std::net::SocketAddr>().is_ok())
                .map(|text| json!(text))
                .ok_or_else(allowed),
            Kind::List => match value {
                Value::Array(items) if items.iter().all(Value::is_string) => Ok(value.clone()),
                Value::String(text) => {
                    let items = text
                        .split(',')
                        .map(str::trim)
                        .filter(|item| !item.is_empty());
                    Ok(Value::Array(items.map(|item| json!(item)).collect()))
                }
                _ => Err(allowed()),
            },
            Kind::Flag => match (value, text()) {
                (Value::Bool(flag), _) => Ok(json!(flag)),
                (_, Some("true" | "1")) => Ok(json!(true)),
                (_, Some("false" | "0")) => Ok(json!(false)),
                _ => Err(allowed()),
            },
            Kind::Number(least, most) => {
                let number = value.as_u64().or_else(|| text()?.parse().ok());
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Real(least, most) => {
                let number = value.as_f64().or_else(|| text()?.parse().ok());
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Bytes(least, most) => {
                let number = value.as_u64().or_else(|| bytes(text()?));
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
            Kind::Time(least, most) => {
                let seconds = value.as_f64().map(|seconds| seconds * 1e3);
                let number = seconds.or_else(|| milliseconds(text()?)).and_then(whole);
                number
                    .filter(|n| (least..=most).contains(n))
                    .map(|n| json!(n))
                    .ok_or_else(allowed)
            }
        }
    }
}

fn split(text: &str) -> (&str, &str) {
    let unit = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    (text[..unit].trim(), &text[unit..])
}

fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = split(text);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn milliseconds(text: &str) -> Option<f64> {
    let (number, unit) = split(text);
    let factor = match unit {
        "ms" => 1.0,
        "" | "s" => 1e3,
        "m" => 60e3,
        "h" => 3_600e3,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// A number of milliseconds as a whole one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(number: f64) -> Option<u64> {
    (number.is_finite() && (0.0..1e15).contains(&number)).then(|| number.round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_bytes_are_read_with_their_units() {
        let time = key("t", Kind::Time(0, HOUR), "0s", "");
        assert_eq!(time.check(&json!("250ms")), Ok(json!(250)));
        assert_eq!(time.check(&json!("1.5s")), Ok(json!(1500)));
        assert_eq!(time.check(&json!(2)), Ok(json!(2000)));
        assert!(time.check(&json!("2 weeks")).is_err());
        assert!(time.check(&json!("-1s")).is_err());
        assert!(time.check(&json!("NaN")).is_err());
        let real = key("r", Kind::Real(0.0, 2.0), "1", "");
        assert_eq!(real.check(&json!("0.5")), Ok(json!(0.5)));
        assert!(real.check(&json!(2.5)).is_err() && real.check(&json!("NaN")).is_err());
        let size = key("b", Kind::Bytes(1, GIB), "1", "");
        assert_eq!(size.check(&json!("16MiB")), Ok(json!(16 << 20)));
        assert!(size.check(&json!("16MB")).is_err());
    }
}
