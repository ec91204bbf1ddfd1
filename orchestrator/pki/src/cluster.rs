//! The files of one control plane, and what an agent is given of them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::authority::{self, Authority, Error, Identity, Usage};
use crate::kubeconfig;

/// Common name by which etcd knows the control plane: it may do all.
pub const ETCD_ROOT_USER: &str = "kube-apiserver";
/// Common name by which etcd knows the network agents: they may read and write the network's keys only.
pub const ETCD_NETWORK_USER: &str = "netagent";

/// Common name by which agents know the API server: it may use their API (kubeadm's name). It is in no group, so that the
/// key opens nothing else.
pub const KUBELET_CLIENT_USER: &str = "kube-apiserver-kubelet-client";

/// What all control planes of a cluster have in common: the authorities, and the key for ServiceAccount tokens.
pub const SHARED_FILES: [&str; 5] = ["ca.crt", "ca.key", "etcd-ca.crt", "etcd-ca.key", "sa.key"];

/// How a server is reached: what its certificates have to name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerNames {
    pub addresses: Vec<IpAddr>,
    pub names: Vec<String>,
}

impl ServerNames {
    /// The server at `advertise`, the Service `kubernetes` at `kubernetes_ip`, loopback, and `extra` names or addresses.
    #[must_use]
    pub fn new(
        advertise: IpAddr,
        kubernetes_ip: IpAddr,
        cluster_domain: &str,
        extra: &[String],
    ) -> Self {
        let mut addresses =
            vec![advertise, IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), kubernetes_ip];
        let mut names: Vec<String> =
            ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
                .map(str::to_owned)
                .into();
        names.push(format!("kubernetes.default.svc.{cluster_domain}"));
        for name in extra {
            match name.parse() {
                Ok(address) => addresses.push(address),
                Err(_) => names.push(name.clone()),
            }
        }
        Self { addresses, names }
    }
}

/// The PKI folder of a control plane.
///
/// Files: `ca`, `etcd-ca` (authorities); `apiserver`, `apiserver-kubelet-client`, `etcd-server`, `etcd-client`
/// (leafs), `sa.key` (signs ServiceAccount tokens), `admin.conf` (kubeconfig).
pub struct ClusterPki {
    dir: PathBuf,
    ca: Arc<Authority>,
    etcd_ca: Arc<Authority>,
}

/// PEM texts and the kubeconfig of one agent.
pub struct AgentCredentials {
    /// kubeconfig of `system:node:NAME`.
    pub kubeconfig: String,
    pub ca: String,
    /// Serving certificate of the kubelet API.
    pub serving_certificate: String,
    pub serving_key: String,
    pub etcd_ca: String,
    pub etcd_certificate: String,
    pub etcd_key: String,
}

impl ClusterPki {
    /// Opens the folder, making what is missing. `addresses` and `names` are how the API server is reached.
    ///
    /// # Errors
    /// A file cannot be read, written or understood.
    pub fn ensure(dir: &Path, addresses: &[IpAddr], names: &[String]) -> Result<Self, Error> {
        let ca = Authority::load_or_create(dir, "ca", "orch-ca").map(Arc::new)?;
        let etcd_ca = Authority::load_or_create(dir, "etcd-ca", "orch-etcd-ca").map(Arc::new)?;
        let server = |user: &str, usage| Identity {
            user: user.to_owned(),
            group: None,
            dns_names: names.to_vec(),
            addresses: addresses.to_vec(),
            usage,
        };
        ca.ensure(dir, "apiserver", &server("kube-apiserver", Usage::Server))?;
        ca.ensure(dir, "apiserver-kubelet-client", &Identity::client(KUBELET_CLIENT_USER, None))?;
        etcd_ca.ensure(dir, "etcd-server", &server("etcd-server", Usage::Both))?;
        etcd_ca.ensure(dir, "etcd-client", &Identity::client(ETCD_ROOT_USER, None))?;
        let token_key = dir.join("sa.key");
        if !token_key.exists() {
            let key = rcgen::KeyPair::generate().map_err(|source| Error::Make {
                subject: "service account tokens".to_owned(),
                source,
            })?;
            authority::write_private(&token_key, &key.serialize_pem())?;
        }
        Ok(Self { dir: dir.to_owned(), ca, etcd_ca })
    }

    /// One file of the folder as text.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, name: &str) -> Result<String, Error> {
        authority::read(&self.dir.join(name))
    }

    /// Path of one file of the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The cluster's authority.
    #[must_use]
    pub fn ca(&self) -> Arc<Authority> {
        self.ca.clone()
    }

    /// etcd's authority.
    #[must_use]
    pub fn etcd_ca(&self) -> Arc<Authority> {
        self.etcd_ca.clone()
    }

    /// The administrator's kubeconfig (`admin.conf`, mode 0600), made when absent or when `server` changed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn ensure_admin_kubeconfig(&self, server: &str) -> Result<PathBuf, Error> {
        let path = self.dir.join("admin.conf");
        let current = std::fs::read_to_string(&path).unwrap_or_default();
        if !current.contains(&format!("\"{server}\"")) {
            let (certificate, key) =
                self.ca.issue(&Identity::client("kubernetes-admin", Some("system:masters")))?;
            let text = kubeconfig::kubeconfig(
                &[server.to_owned()],
                "kubernetes-admin",
                self.ca.certificate_pem(),
                &certificate,
                &key,
            );
            authority::write_private(&path, &text)?;
        }
        Ok(path)
    }

    /// New credentials for the agent of `node`, which reaches the API at one of `servers`.
    ///
    /// # Errors
    /// A name does not fit into a certificate.
    pub fn agent_credentials(
        &self,
        node: &str,
        addresses: &[IpAddr],
        servers: &[String],
    ) -> Result<AgentCredentials, Error> {
        let user = format!("system:node:{node}");
        let (certificate, key) = self.ca.issue(&Identity::client(&user, Some("system:nodes")))?;
        let (serving_certificate, serving_key) = self.ca.issue(&Identity {
            user: user.clone(),
            group: Some("system:nodes".to_owned()),
            dns_names: vec![node.to_owned()],
            addresses: addresses.to_vec(),
            usage: Usage::Server,
        })?;
        let (etcd_certificate, etcd_key) =
            self.etcd_ca.issue(&Identity::client(ETCD_NETWORK_USER, None))?;
        Ok(AgentCredentials {
            kubeconfig: kubeconfig::kubeconfig(
                servers,
                &user,
                self.ca.certificate_pem(),
                &certificate,
                &key,
            ),
            ca: self.ca.certificate_pem().to_owned(),
            serving_certificate,
            serving_key,
            etcd_ca: self.etcd_ca.certificate_pem().to_owned(),
            etcd_certificate,
            etcd_key,
        })
    }
}

impl AgentCredentials {
    /// Writes the files an agent reads into `dir`: `kubelet.conf`, `ca.crt`, `kubelet.{crt,key}`,
    /// `etcd-ca.crt`, `etcd-client.{crt,key}`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        self.write_beside_server(dir)?;
        authority::write_private(&dir.join("etcd-client.key"), &self.etcd_key)?;
        for (name, text) in [
            ("ca.crt", &self.ca),
            ("etcd-ca.crt", &self.etcd_ca),
            ("etcd-client.crt", &self.etcd_certificate),
        ] {
            authority::write_public(&dir.join(name), text)?;
        }
        Ok(())
    }

    /// As [`AgentCredentials::write`], into the folder of a control plane: what the server has under the same names
    /// stays.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write_beside_server(&self, dir: &Path) -> Result<(), Error> {
        authority::write_private(&dir.join("kubelet.key"), &self.serving_key)?;
        authority::write_public(&dir.join("kubelet.crt"), &self.serving_certificate)?;
        // Last: who finds it takes the others for granted.
        authority::write_private(&dir.join("kubelet.conf"), &self.kubeconfig)
    }
}
