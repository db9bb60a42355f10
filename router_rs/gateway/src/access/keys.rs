//! The file of keys: which tenants there are, and the digests of their keys.
//!
//! ```toml
//! [tenants.shop]
//! keys_sha256 = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
//! requests_per_second = 20    # default: the router's tenant_requests_per_s
//! concurrency = 8             # default: the router's tenant_concurrency
//! salt = "shop"               # default: the tenant's name
//!
//! [operators]                 # default: who calls from the router's machine
//! keys_sha256 = ["60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"]
//! ```
//!
//! A key is drawn by whoever makes it and long: its plain digest says nothing of
//! it, and looking for a digest takes no longer for one that is nearly right.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use kvmesh_trust::{FileError, Followed, Wrong};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Caller, TenantLimits, tenant_of};

/// Longest name of a tenant and longest salt, in bytes.
pub(super) const MAX_NAME: usize = 128;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    tenants: BTreeMap<String, Tenant>,
    operators: Option<Operators>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tenant {
    keys_sha256: Vec<String>,
    requests_per_second: Option<f64>,
    concurrency: Option<u32>,
    salt: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Operators {
    keys_sha256: Vec<String>,
}

/// Who has a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Holder {
    /// One of the tenants, with what its calls are like.
    Tenant(Caller),
    /// Somebody who runs the cluster.
    Operator,
}

/// Holders by the SHA-256 of their keys.
#[derive(Debug)]
pub(super) struct Keys {
    by_digest: HashMap<[u8; 32], Holder>,
    tenants: HashMap<String, Caller>,
    operators: bool,
}

impl Keys {
    /// Follows the file of the setting `api_keys`.
    pub(super) fn open(file: &Path, usual: TenantLimits) -> Result<Followed<Self>, FileError> {
        let files = vec![("api_keys", file.to_owned())];
        Followed::open(files, move |said, before| {
            let text = said.first().map(Vec::as_slice).unwrap_or_default();
            let keys = Self::from_text(text, usual).map_err(|reason| Wrong::new(0, reason))?;
            // That operators need no key any more is nothing that a file says by what
            // it lacks.
            match before.is_some_and(Self::has_operators) && !keys.has_operators() {
                true => Err(Wrong::new(
                    0,
                    "[operators] is gone; to let go of it start the router anew",
                )),
                false => Ok(keys),
            }
        })
    }

    fn from_text(text: &[u8], usual: TenantLimits) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
        // Where, and not what: messages quote the file, and a key may stand there by mistake.
        let file: File = toml::from_str(text).map_err(|error| misread(text, &error))?;
        let mut keys = Self {
            by_digest: HashMap::new(),
            tenants: HashMap::new(),
            operators: file.operators.is_some(),
        };
        for (name, tenant) in file.tenants {
            let place = format!("tenants.{name}");
            let salt = tenant.salt.as_ref().unwrap_or(&name);
            for (what, text) in [("the name", &name), ("salt", salt)] {
                if text.is_empty() || text.len() > MAX_NAME || text.contains(char::is_control) {
                    return Err(format!(
                        "{place}: {what} has {} bytes; allowed are 1 to {MAX_NAME} bytes without control characters",
                        text.len()
                    ));
                }
            }
            let rate = tenant
                .requests_per_second
                .unwrap_or(usual.requests_per_second);
            if !(0.0..=1e9).contains(&rate) {
                return Err(format!(
                    "{place}: requests_per_second is {rate}; allowed is 0 (no limit) to 1e9"
                ));
            }
            let caller = Caller {
                tenant: tenant_of(&name),
                salt: Arc::from(salt.as_str()),
                operates: false,
                limits: TenantLimits {
                    requests_per_second: rate,
                    concurrency: tenant.concurrency.unwrap_or(usual.concurrency),
                },
            };
            keys.add(&place, &tenant.keys_sha256, || {
                Holder::Tenant(caller.clone())
            })?;
            keys.tenants.insert(name, caller);
        }
        if let Some(operators) = file.operators {
            keys.add("operators", &operators.keys_sha256, || Holder::Operator)?;
        }
        if keys.by_digest.is_empty() {
            return Err("it has no key; without api_keys none is asked for".to_owned());
        }
        Ok(keys)
    }

    fn add(
        &mut self,
        place: &str,
        digests: &[String],
        holder: impl Fn() -> Holder,
    ) -> Result<(), String> {
        for (at, text) in digests.iter().enumerate() {
            let place = format!("{place}: keys_sha256[{at}]");
            let digest = digest_of_hex(text).ok_or_else(|| {
                format!("{place} is no SHA-256 digest; allowed are 64 hexadecimal digits")
            })?;
            if self.by_digest.insert(digest, holder()).is_some() {
                return Err(format!("{place} is in the file twice"));
            }
        }
        Ok(())
    }

    pub(super) fn holder(&self, key: &str) -> Option<&Holder> {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        self.by_digest.get(&digest)
    }

    /// Whether operators have keys: then nobody operates without one.
    pub(super) fn has_operators(&self) -> bool {
        self.operators
    }

    /// A tenant by name, for those who are known by more than keys.
    pub(super) fn tenant(&self, name: &str) -> Option<&Caller> {
        self.tenants.get(name)
    }

    pub(super) fn tenants(&self) -> usize {
        self.tenants.len()
    }
}

fn digest_of_hex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(digest)
}

/// Where a file cannot be read, without what stands there.
fn misread(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let line = before.map(|before| before.matches('\n').count() + 1);
    let place = line.map_or(String::new(), |line| format!("line {line}: "));
    format!(
        "{place}not as a file of keys is: [tenants.NAME] with keys_sha256 = [\"64 hexadecimal digits\"], \
         requests_per_second, concurrency and salt, and [operators] with keys_sha256"
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const USUAL: TenantLimits = TenantLimits {
        requests_per_second: 2.5,
        concurrency: 7,
    };

    fn sha256(key: &str) -> String {
        Sha256::digest(key)
            .iter()
            .map(|byte| format!("{byte:02X}"))
            .collect()
    }

    fn tenant(keys: &Keys, key: &str) -> Caller {
        match keys.holder(key) {
            Some(Holder::Tenant(caller)) => caller.clone(),
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn a_key_is_its_tenants_with_what_the_file_says_of_it() {
        let (one, two, other) = (sha256("one"), sha256("two"), sha256("other"));
        let text = format!(
            "[tenants.shop]\nkeys_sha256 = ['{one}', '{two}']\n\
             [tenants.'the rest']\nkeys_sha256 = ['{other}']\n\
             concurrency = 3\nrequests_per_second = 0\nsalt = 'shop'\n"
        );
        let keys = Keys::from_text(text.as_bytes(), USUAL).unwrap();
        let shop = tenant(&keys, "one");
        assert_eq!(shop, tenant(&keys, "two"));
        assert_eq!((&*shop.salt, shop.limits), ("shop", USUAL));
        let rest = tenant(&keys, "other");
        // They share prefixes and nothing else.
        assert_eq!(rest.salt, shop.salt);
        assert_ne!(rest.tenant, shop.tenant);
        assert_eq!(rest.limits.concurrency, 3);
        assert!(rest.limits.requests_per_second == 0.0);
        for unknown in ["", "thr", "One", &one] {
            assert_eq!(keys.holder(unknown), None);
        }
        assert!(!keys.has_operators());
    }

    #[test]
    fn operators_without_a_key_are_nobody() {
        let shop = format!("[tenants.a]\nkeys_sha256 = ['{}']\n", sha256("key"));
        let none = shop.clone() + "[operators]\nkeys_sha256 = []";
        assert!(
            Keys::from_text(none.as_bytes(), USUAL)
                .unwrap()
                .has_operators()
        );
        assert!(
            !Keys::from_text(shop.as_bytes(), USUAL)
                .unwrap()
                .has_operators()
        );
        let text = format!("[operators]\nkeys_sha256 = ['{}']", sha256("root"));
        let keys = Keys::from_text(text.as_bytes(), USUAL).unwrap();
        assert_eq!(keys.holder("root"), Some(&Holder::Operator));
    }

    #[test]
    fn what_stands_in_a_file_by_mistake_is_not_told() {
        for text in [
            "[tenants.shop]\nkeys_sha256 = \"kvmesh-secret\"\n",
            "[tenants.shop]\nkvmesh-secret = 1\n",
            "[tenants.shop]\nsalt = \"kvmesh-secret\u{7}\"\nkeys_sha256 = []\n",
            "[tenants.shop]\nkeys_sha256 = [\"kvmesh-secret\"]\n",
        ] {
            let error = Keys::from_text(text.as_bytes(), USUAL).err().unwrap();
            assert!(!error.contains("secret"), "{error}");
            assert!(
                error.contains("shop") || error.contains("line 2"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_with_what_is_allowed() {
        let digest = sha256("key");
        let with = |rest: &str| format!("[tenants.a]\nkeys_sha256 = ['{digest}']\n{rest}");
        for (text, said) in [
            (String::new(), "no key"),
            ("[operators]\nkeys_sha256 = []".to_owned(), "no key"),
            ("[tenants.a]".to_owned(), "keys_sha256"),
            (with("keys = []"), "keys"),
            (with("requests_per_second = -1"), "0 (no limit) to 1e9"),
            (with("requests_per_second = nan"), "0 (no limit) to 1e9"),
            (with("concurrency = -1"), "line 3: not as"),
            (with("salt = ''"), "tenants.a: salt"),
            (with("[tenants.'']\nkeys_sha256 = []"), "1 to 128 bytes"),
            (
                with(&format!("[tenants.b]\nkeys_sha256 = ['{digest}']")),
                "tenants.b: keys_sha256[0] is in the file twice",
            ),
            (
                "[operators]\nkeys_sha256 = ['a key']".to_owned(),
                "operators: keys_sha256[0] is no SHA-256 digest",
            ),
        ] {
            let error = Keys::from_text(text.as_bytes(), USUAL).unwrap_err();
            assert!(error.contains(said), "{said} is not in: {error}");
            assert!(!error.contains("a key'"), "{error}");
        }
    }
}
