//! Tokens that somebody else signs (JWT, RFC 7519): their keys come from a file in
//! JWKS form (RFC 7517), which is read again when it changes.
//!
//! Which algorithm a signature has to be of is said by the key, never by the token
//! (RFC 8725, 3.1).

use std::{path::Path, sync::Arc, time::Duration};

use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind, EncodingKey, Validation,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    decode, decode_header,
    errors::{Error, ErrorKind},
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
    signature,
};
use kvmesh_trust::{FileError, Followed, Wrong};
use ring::{
    hmac,
    signature::{
        ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents,
        UnparsedPublicKey,
    },
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::keys::MAX_NAME;
use crate::settings::JwtSettings;

/// Most keys in a file.
const MOST: usize = 64;
/// Shortest secret of HS256, in bytes (RFC 7518, 3.2), and shortest modulus of RS256.
const SHORTEST: (usize, usize) = (32, 256);
/// Keys that a token without `kid` is tried with.
const TRIED: usize = 8;

/// Whose tokens are taken, and how a tenant is read off them.
#[derive(Debug)]
pub(super) struct Jwt {
    pub(super) keys: Arc<Followed<JwtKeys>>,
    issuer: String,
    audience: String,
    tenant_claim: String,
    leeway: Duration,
}

/// The keys of a file that can be used.
#[derive(Debug)]
pub(super) struct JwtKeys(Vec<JwtKey>);

#[derive(Debug)]
struct JwtKey {
    id: Option<String>,
    algorithm: Algorithm,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct File {
    keys: Vec<Map<String, Value>>,
}

impl Jwt {
    /// # Errors
    /// [`FileError`] for a file that cannot be read or used.
    pub(super) fn open(file: &Path, settings: &JwtSettings) -> Result<Self, FileError> {
        // An error: that was done already.
        let _ = RING.install_default();
        let files = vec![("jwt_keys", file.to_owned())];
        let keys = Followed::open(files, |said, _| {
            let text = said.first().map(Vec::as_slice).unwrap_or_default();
            JwtKeys::parse(text).map_err(|reason| Wrong::new(0, reason))
        })?;
        Ok(Self {
            keys: Arc::new(keys),
            issuer: settings.issuer.clone(),
            audience: settings.audience.clone(),
            tenant_claim: settings.tenant_claim.clone(),
            leeway: settings.leeway,
        })
    }

    /// The tenant of a token that is good now; `None` for any other text.
    pub(super) fn tenant(&self, token: &str) -> Option<String> {
        // Most keys of ours and most guesses end here.
        if token.bytes().filter(|&byte| byte == b'.').count() != 2 {
            return None;
        }
        let header = decode_header(token).ok()?;
        // Nothing that has to be understood is understood (RFC 7515, 4.1.11).
        if header.crit.is_some() {
            return None;
        }
        let keys = self.keys.now();
        let named = |key: &&JwtKey| {
            key.algorithm == header.alg && (header.kid.is_none() || key.id == header.kid)
        };
        keys.0
            .iter()
            .filter(named)
            .take(TRIED)
            .find_map(|key| self.read(token, key))
    }

    fn read(&self, token: &str, key: &JwtKey) -> Option<String> {
        let mut wanted = Validation::new(key.algorithm);
        wanted.set_required_spec_claims(&["exp", "iss", "aud"]);
        wanted.set_issuer(&[&self.issuer]);
        wanted.set_audience(&[&self.audience]);
        wanted.leeway = self.leeway.as_secs();
        wanted.validate_nbf = true;
        let read = decode::<Map<String, Value>>(token, &key.key, &wanted).ok()?;
        let tenant = read.claims.get(&self.tenant_claim)?.as_str()?;
        let fits = (1..=MAX_NAME).contains(&tenant.len()) && !tenant.contains(char::is_control);
        fits.then(|| tenant.to_owned())
    }
}

impl JwtKeys {
    /// Keys of other kinds and uses are passed over, as the form wants it.
    fn parse(text: &[u8]) -> Result<Self, String> {
        // Where it is wrong, never what is there.
        let file: File = serde_json::from_slice(text).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            format!("it is no JWKS, line {line} column {column}; allowed is {{\"keys\": [...]}}")
        })?;
        if file.keys.len() > MOST {
            let found = file.keys.len();
            return Err(format!("it has {found} keys; allowed are {MOST}"));
        }
        let mut keys: Vec<JwtKey> = Vec::new();
        for (n, key) in file.keys.into_iter().enumerate() {
            let Some(key) = JwtKey::read(key).map_err(|why| format!("keys[{n}] {why}"))? else {
                continue;
            };
            let twice = |other: &JwtKey| other.id.is_some() && other.id == key.id;
            if keys.iter().any(twice) {
                return Err(format!("keys[{n}] has the kid of another key"));
            }
            keys.push(key);
        }
        match keys.is_empty() {
            true => Err(
                "it has no key that can be used; allowed are oct (HS256), RSA (RS256), EC P-256 \
                 (ES256) and OKP Ed25519 (EdDSA)"
                    .to_owned(),
            ),
            false => Ok(Self(keys)),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl JwtKey {
    fn read(key: Map<String, Value>) -> Result<Option<Self>, &'static str> {
        let Ok(jwk) = serde_json::from_value::<Jwk>(Value::Object(key)) else {
            return Ok(None);
        };
        if matches!(&jwk.common.public_key_use, Some(used) if *used != PublicKeyUse::Signature) {
            return Ok(None);
        }
        let (algorithm, named) = match &jwk.algorithm {
            AlgorithmParameters::OctetKey(_) => (Algorithm::HS256, KeyAlgorithm::HS256),
            AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
                (Algorithm::ES256, KeyAlgorithm::ES256)
            }
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
            }
            _ => return Ok(None),
        };
        if jwk.common.key_algorithm.is_some_and(|said| said != named) {
            return Ok(None);
        }
        let key = DecodingKey::from_jwk(&jwk).map_err(|_| "is no base64url")?;
        match key.kind() {
            DecodingKeyKind::SecretOrDer(secret)
                if algorithm == Algorithm::HS256 && secret.len() < SHORTEST.0 =>
            {
                return Err("is shorter than the 256 bits that HS256 needs");
            }
            DecodingKeyKind::RsaModulusExponent { n, .. } if n.len() < SHORTEST.1 => {
                return Err("is shorter than 2048 bits");
            }
            _ => {}
        }
        let id = jwk.common.key_id;
        Ok(Some(Self { id, algorithm, key }))
    }
}

// -- signatures, by the ring that TLS has --------------------------------------

static RING: CryptoProvider = CryptoProvider {
    signer_factory: no_signer,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// Nothing is signed here.
fn no_signer(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    Err(ErrorKind::InvalidAlgorithm.into())
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    let (algorithm, key) = (*algorithm, key.kind().clone());
    Ok(Box::new(RingVerifier { algorithm, key }))
}

struct RingVerifier {
    algorithm: Algorithm,
    key: DecodingKeyKind,
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl signature::Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signed: &Vec<u8>) -> Result<(), signature::Error> {
        let verified = match (self.algorithm, &self.key) {
            (Algorithm::HS256, DecodingKeyKind::SecretOrDer(secret)) => {
                hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, secret), message, signed)
            }
            (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, signed)
            }
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signed)
            }
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(&ED25519, point).verify(message, signed)
            }
            _ => Err(ring::error::Unspecified),
        };
        verified.map_err(|_| signature::Error::new())
    }
}
