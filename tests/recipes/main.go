// The server and the client of a test around the page's identity.go: `main server ADDRESS CA` answers with the name of
// whoever calls, `main client URL CA COUNT` asks, once for each line of its input, over a new connection each time.
package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	authority, err := os.ReadFile(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(authority)
	if os.Args[1] == "server" {
		config := SERVER
		greet := func(answer http.ResponseWriter, request *http.Request) {
			fmt.Fprintf(answer, "hello %s %v\n", CALLER, request.TLS.PeerCertificates[0].SerialNumber)
		}
		server := http.Server{Addr: os.Args[2], TLSConfig: &config, Handler: http.HandlerFunc(greet)}
		log.Fatal(server.ListenAndServeTLS("", ""))
	}
	config := CLIENT
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &config, DisableKeepAlives: true}}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		answer, err := client.Get(os.Args[2])
		if err != nil {
			fmt.Println(err)
			continue
		}
		io.Copy(os.Stdout, answer.Body)
		answer.Body.Close()
	}
}
